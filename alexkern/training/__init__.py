"""The paper's training system: command line, loop, checkpoints and metrics."""
