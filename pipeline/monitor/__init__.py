"""One sink a file: a frozen `Config` whose `open(run_dir, start_step, total_steps)` returns a `Sink`."""
