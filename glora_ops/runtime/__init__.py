"""What glora asks of the operating system: files and folders that appear whole or not at all."""
