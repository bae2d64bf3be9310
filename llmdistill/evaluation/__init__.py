"""Judging models: functions of models and rows, used by the jobs and by the scripts in `eval/`."""
