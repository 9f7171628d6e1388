"""Settings of Sphinx: `make docs` builds the pages in docs/ with warnings as errors."""

from dsc_hub import __version__

project = "dsc_hub"
author = "the dsc_hub authors"
copyright = "the dsc_hub authors, Apache-2.0"
release = version = __version__
extensions = ["myst_parser", "sphinx_copybutton", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "generate.py"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository; tests/docs checks that they exist
html_theme = "furo"
html_title = "dsc_hub"
html_static_path = ["pictures"]
copybutton_prompt_text = "$ "
autodoc_typehints = "description"
nitpicky = False
