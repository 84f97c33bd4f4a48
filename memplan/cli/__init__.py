"""The command line: parse, build, run, render; one file a command."""
