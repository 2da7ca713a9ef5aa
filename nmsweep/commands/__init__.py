"""The subcommands of `nmsweep`, one file each but for those of a stored sweep, which share one."""
