"""What is measured: speed, compile time and memory beside backend="inductor", in one run."""
