"""Know what happens. Files only; a viewer never touches a run.

Reading order: recorder, throughput, sinks, supersede, status; progress, plain, panel, sparkline; resources; runs, report.
"""
