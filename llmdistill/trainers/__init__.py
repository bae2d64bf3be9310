"""Trainers: the meeting of student, teacher, rows and objective. Each file holds a config, then its trainer."""
