"""The table of stages is whole: whoever adds a stage learns here what it lacks."""

from __future__ import annotations

import pytest

from dsc_hub.cli.main import cli
from dsc_hub.config import stages
from dsc_hub.pipeline.stages import STAGE
from dsc_hub.runs.metrics_schema import Metrics


@pytest.mark.parametrize("stage", stages.STAGES, ids=lambda stage: stage.name)
def test_a_stage_has_a_function_a_command_and_sections_that_the_schema_knows(stage: stages.Stage):
    assert stage.name == "publish" or stage.name in STAGE
    assert stage.command in cli.commands
    assert set(stage.sections) <= set(Metrics.model_fields)
    assert not stage.sections or stage.sections[0] == stage.name
    assert stage.version >= 1


def test_every_section_of_the_numbers_is_written_by_one_stage():
    written = [section for stage in stages.STAGES for section in stage.sections]
    # These two hold the seconds of all of them.
    assert sorted([*written, "stages", "server_starts", "schema_"]) == sorted(Metrics.model_fields)
    assert stages.writer_of("test_set") == "evaluation" and stages.writer_of("stages") == "pipeline"


def test_no_two_stages_share_a_file_and_the_functions_are_those_of_the_table():
    files = [name for stage in stages.STAGES for name in stage.files]
    assert len(files) == len(set(files))
    assert set(STAGE) == set(stages.NAMES) - {"publish"}


def test_the_order_is_that_of_the_data():
    assert stages.before("prompts") == () and stages.after("publish") == ()
    assert stages.up_to("dataset") == ("prompts", "sampling", "dataset")
    assert (*stages.up_to("distill"), *stages.after("distill")) == stages.NAMES
    with pytest.raises(KeyError):
        stages.before("training")
