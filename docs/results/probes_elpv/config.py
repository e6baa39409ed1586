"""What is not said here is as the defaults have it."""

from kdgqa_jax.config import study_config


def get_config(arg=""):
    """The config of the report."""
    config = study_config()
    config.calibration_images = 128
    config.finetune.checkpoint_every = 100
    config.finetune.data.augment.rand_augment_ops = 0
    config.finetune.data.name = 'tuxpaint_stamps'
    config.finetune.epochs = 0.0
    config.finetune.eval_batch_size = 64
    config.finetune.eval_every_epochs = 0.0
    config.finetune.log_every = 10
    config.finetune.model.image_size = 112
    config.finetune.model.scan_layers = True
    config.finetune.model.window = 20
    config.finetune.optim.learning_rate = 0.0001
    config.finetune.optim.schedule = 'cosine'
    config.finetune.optim.warmup_steps = 10
    config.finetune.optim.weight_decay = 0.05
    config.grid = ('num_kv_heads=3|2', 'pooling=mean|svd|svd+refit')
    config.pretrain.checkpoint_every = 100
    config.pretrain.data.augment.rand_augment_ops = 0
    config.pretrain.data.name = 'elpv'
    config.pretrain.data.test_share = 0.5
    config.pretrain.data.train_share = 0.2
    config.pretrain.epochs = 0.0
    config.pretrain.eval_batch_size = 64
    config.pretrain.eval_every_epochs = 0.0
    config.pretrain.init = 'dinov2_small'
    config.pretrain.log_every = 10
    config.pretrain.model.image_size = 112
    config.pretrain.model.scan_layers = True
    config.pretrain.model.window = 20
    config.pretrain.optim.learning_rate = 0.0001
    config.pretrain.optim.schedule = 'cosine'
    config.pretrain.optim.warmup_steps = 10
    config.pretrain.optim.weight_decay = 0.05
    config.probes = ('knn', 'linear')
    config.rates.evaluate = 45.0
    config.rates.overhead = 7.0
    config.rates.train = 15.0
    config.seeds = 5
    config.uptrain.checkpoint_every = 100
    config.uptrain.data.augment.rand_augment_ops = 0
    config.uptrain.data.name = 'elpv'
    config.uptrain.data.test_share = 0.5
    config.uptrain.data.train_share = 0.2
    config.uptrain.epochs = 0.0
    config.uptrain.eval_batch_size = 64
    config.uptrain.eval_every_epochs = 0.0
    config.uptrain.log_every = 10
    config.uptrain.model.image_size = 112
    config.uptrain.model.scan_layers = True
    config.uptrain.model.window = 20
    config.uptrain.optim.learning_rate = 0.0001
    config.uptrain.optim.schedule = 'cosine'
    config.uptrain.optim.warmup_steps = 10
    config.uptrain.optim.weight_decay = 0.05
    config.variants = ('mha', 'gqa', 'kdgqa')
    return config
