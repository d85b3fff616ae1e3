"""Shows runs in the browser. It only reads the files of runs, so closing, killing or breaking it never affects a training.

Reading order: library, curves, charts; pages, rows, live; gate, app.
"""
