"""What is not said here is as the defaults have it."""

from kdgqa_jax.config import study_config


def get_config(arg=""):
    """The config of the report."""
    config = study_config()
    config.finetune.batch_size = 64
    config.finetune.checkpoint_every = 100
    config.finetune.data.augment.rand_augment_ops = 0
    config.finetune.data.shift = 'negative_quarter_turn'
    config.finetune.epochs = 7.0
    config.finetune.eval_every_epochs = 0.0
    config.finetune.log_every = 5
    config.finetune.model.drop_path = 0.1
    config.finetune.model.image_size = 8
    config.finetune.model.name = 'mu/2'
    config.finetune.model.scan_layers = True
    config.finetune.model.window = 80
    config.finetune.optim.learning_rate = 0.003
    config.finetune.optim.schedule = 'cosine'
    config.finetune.optim.warmup_steps = 20
    config.finetune.optim.weight_decay = 0.3
    config.pretrain.batch_size = 64
    config.pretrain.checkpoint_every = 100
    config.pretrain.data.augment.rand_augment_ops = 0
    config.pretrain.epochs = 45.0
    config.pretrain.eval_every_epochs = 0.0
    config.pretrain.log_every = 5
    config.pretrain.model.drop_path = 0.2
    config.pretrain.model.image_size = 8
    config.pretrain.model.name = 'mu/2'
    config.pretrain.model.scan_layers = True
    config.pretrain.model.window = 80
    config.pretrain.optim.learning_rate = 0.003
    config.pretrain.optim.schedule = 'cosine'
    config.pretrain.optim.warmup_steps = 20
    config.pretrain.optim.weight_decay = 0.5
    config.rates.evaluate = 3000.0
    config.rates.overhead = 10.0
    config.rates.train = 1000.0
    config.seeds = 5
    config.uptrain.batch_size = 64
    config.uptrain.checkpoint_every = 100
    config.uptrain.data.augment.rand_augment_ops = 0
    config.uptrain.epochs = 7.0
    config.uptrain.eval_every_epochs = 0.0
    config.uptrain.log_every = 5
    config.uptrain.model.drop_path = 0.1
    config.uptrain.model.image_size = 8
    config.uptrain.model.name = 'mu/2'
    config.uptrain.model.scan_layers = True
    config.uptrain.model.window = 80
    config.uptrain.optim.learning_rate = 0.003
    config.uptrain.optim.schedule = 'cosine'
    config.uptrain.optim.warmup_steps = 20
    config.uptrain.optim.weight_decay = 0.3
    config.variants = ('mha', 'gqa', 'gqa@svd', 'kdgqa', 'dgqa_ema', 'dgqa_diff', 'pgqa')
    return config
