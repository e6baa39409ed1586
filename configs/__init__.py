"""ml_collections configs, one per job: `get_config(arg)`. kdgqa_jax/config.py has the fields."""
