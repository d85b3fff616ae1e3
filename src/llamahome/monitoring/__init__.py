"""Records what a run does and shows it. Viewers only read the files of a run.

Reading order: recorder, throughput, sinks, status; progress, plain, panel, display; resources, environment; runs, report.
"""
