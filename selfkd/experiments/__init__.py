"""What is trained and chosen: the engine, and the recipes over it."""
