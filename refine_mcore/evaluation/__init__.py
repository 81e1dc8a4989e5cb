"""Looking at a trained or converted model."""
