"""What was measured: rows, records, their merge, and the table that a law is fitted to. No torch."""
