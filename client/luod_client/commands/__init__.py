"""What luoctl's commands do. Each function takes the parsed arguments, writes its answer to stdout, and raises what goes wrong."""
