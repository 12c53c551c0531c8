"""What it means: forms, fitter, bootstrap, diagnostics. numpy and scipy only."""
