"""Shows runs in the browser. It only reads the files of runs, so closing, killing or breaking it never affects a training.

Only with `dashboard --allow-start` it starts, stops and resumes trainings, which are processes of their own.
Reading order: library, curves, charts; pages, rows, live; commands, drafts, started, starting; gate, app.
"""
