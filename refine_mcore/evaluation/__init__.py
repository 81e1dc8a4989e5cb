"""What a trained or converted model makes of given tokens."""
