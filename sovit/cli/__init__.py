"""The command line: one file a group of commands, each a typed function that imports only what it uses."""
