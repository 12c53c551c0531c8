"""How far a law can be trusted: altered choices, coverage of its intervals, ledgers drawn from known laws."""
