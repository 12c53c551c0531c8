"""What a run is: shapes and what they cost, recipes, runs, designs. Pure Python."""
