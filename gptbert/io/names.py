"""Names of the files and folders of runs and saved models, and of what records hold."""

# in a run's folder
METRICS = "metrics.jsonl"  # records of steps
SAMPLES = "samples.jsonl"  # masks filled in at validations
RUN_CONFIG = "config.json"  # settings and machine
RUN_FILE = "run.yaml"  # the settings as flags
OWNER = "owner.json"  # while a process trains in it
BEST = "best.json"  # which checkpoint `--keep_best` keeps
CHECKPOINTS = "checkpoints"
WORD_CHECKPOINTS = "words"  # checkpoints by words seen

# of a saved model
MODEL_CONFIG = "model_config.json"
TRAIN_CONFIG = "train_config.json"
TOKENIZER = "tokenizer.json"  # also in a run's folder
WORDS = "words.json"  # of a checkpoint by words: its step, and the words seen
STEP = "step.json"  # of weights without training state: the step that they are of
TRAINING_STATE = "training_state.pt"
SHARDS = "shards"  # a sharded checkpoint's tensors
MANIFEST = "manifest.json"  # sizes and digests of the other files

# in records: weights/objective/measure
MEASURES = ("loss", "perplexity", "accuracy")
VALIDATED = ("validation", "validation_ema")  # the weights and their moving average
