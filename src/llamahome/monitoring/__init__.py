"""Know what happens. Reading order: recorder, throughput, sinks, supersede, status, progress, panel, plain, resources, runs, report. Files only; a viewer never touches a run."""
