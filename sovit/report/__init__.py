"""How it is told: report.md, one HTML page, figures."""
