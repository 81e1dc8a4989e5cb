"""Fast-weight language models as Megatron-Core modules, and the state they carry."""
