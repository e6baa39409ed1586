"""What is not said here is as the defaults have it."""

from kdgqa_jax.config import study_config


def get_config(arg=""):
    """The config of the report."""
    config = study_config()
    config.finetune.batch_size = 128
    config.finetune.data.augment.rand_augment_ops = 0
    config.finetune.data.data_dir = '/usr/share/datasets/fashion-mnist'
    config.finetune.data.name = 'fashion_mnist'
    config.finetune.data.on_device = True
    config.finetune.data.shift = 'negative_quarter_turn'
    config.finetune.epochs = 1.0
    config.finetune.eval_every_epochs = 0.0
    config.finetune.log_every = 20
    config.finetune.model.image_size = 28
    config.finetune.model.name = 'mini/7'
    config.finetune.model.scan_layers = True
    config.finetune.model.window = 100
    config.finetune.optim.learning_rate = 0.0005
    config.finetune.optim.schedule = 'cosine'
    config.finetune.optim.warmup_steps = 10
    config.finetune.optim.weight_decay = 0.05
    config.grid = ('num_kv_heads=4', 'model.noise_target=maps|output', 'model.noise_scale=0.1|0.3|1.0')
    config.pretrain.batch_size = 128
    config.pretrain.data.augment.rand_augment_ops = 0
    config.pretrain.data.data_dir = '/usr/share/datasets/fashion-mnist'
    config.pretrain.data.name = 'fashion_mnist'
    config.pretrain.data.on_device = True
    config.pretrain.epochs = 6.0
    config.pretrain.eval_every_epochs = 0.0
    config.pretrain.log_every = 20
    config.pretrain.model.image_size = 28
    config.pretrain.model.name = 'mini/7'
    config.pretrain.model.scan_layers = True
    config.pretrain.model.window = 100
    config.pretrain.optim.learning_rate = 0.002
    config.pretrain.optim.schedule = 'cosine'
    config.pretrain.optim.warmup_steps = 200
    config.pretrain.optim.weight_decay = 0.05
    config.rates.evaluate = 5000.0
    config.rates.overhead = 6.0
    config.rates.train = 2000.0
    config.seeds = 3
    config.uptrain.batch_size = 128
    config.uptrain.data.augment.rand_augment_ops = 0
    config.uptrain.data.data_dir = '/usr/share/datasets/fashion-mnist'
    config.uptrain.data.name = 'fashion_mnist'
    config.uptrain.data.on_device = True
    config.uptrain.epochs = 1.0
    config.uptrain.eval_every_epochs = 0.0
    config.uptrain.log_every = 20
    config.uptrain.model.image_size = 28
    config.uptrain.model.name = 'mini/7'
    config.uptrain.model.scan_layers = True
    config.uptrain.model.window = 100
    config.uptrain.optim.learning_rate = 0.0005
    config.uptrain.optim.schedule = 'cosine'
    config.uptrain.optim.warmup_steps = 10
    config.uptrain.optim.weight_decay = 0.05
    config.variants = ('gqa', 'pgqa')
    return config
