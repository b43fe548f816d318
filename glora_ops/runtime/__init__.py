"""What glora asks of the operating system: files that appear whole, locks, signals, memory."""
