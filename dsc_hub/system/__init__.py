"""What the rest stands on: this machine, its files, its processes and its terminal. Imports nothing of dsc_hub but `errors`."""
