"""Know what happens. Reading order: recorder, throughput, sinks, progress, resources, runs. Files only; a viewer never touches a run."""
