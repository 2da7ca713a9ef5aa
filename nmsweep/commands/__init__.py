"""The commands of `nmsweep`: one file each, with a function `main(words)` that returns the exit code."""
