"""What every explanation of a model runs through."""
