"""The words that recipes and the command line may choose from; loads nothing, so that `--help` is quick."""

ALIGNMENT_METHODS = (
    "weight_matching",
    "activation_matching",
    "commutativity_matching",
    "learned_matching",
    "none",
)
"""How one model is brought into the coordinates of another."""

METHODS_WITH_DATA = ("activation_matching", "commutativity_matching", "learned_matching")
"""Those that look at calibration data."""

STARTS = ("identity", "activation_matching")
"""Where weight matching starts."""

GROUPS = ("permutation", "full")
"""What an axis may be transformed by: permutations, or all that its architecture allows inside stock checkpoints."""

TOGETHER = ("reference", "star", "universe")
"""How more than two models are aligned: each onto the reference, by way of a centre among them, or all together."""

UNIVERSE_METHODS = ("weight_matching", "activation_matching")
"""Methods that align all models to each other at once."""

LABEL_ORDERS = ("keep", "names", "match")
"""How classes are brought into the order of the first model: not, by their names, or by what the models answer."""

SOLVERS = ("exact", "auction")
"""How wide axes are assigned: to the optimum, or to within a certified gap of it."""

UNITS = ("sample", "token")
"""What has a feature vector of its own in a diagnosis: a sample with all its tokens, as in the paper, or a token."""

PAIR_MEASURES = ("additivity", "commutativity", "stitching", "geometry")
"""What a diagnosis of two models may measure beside loss, metric and LLFC."""

MERGE_MEASURES = ("blocks", "fold", "importance", "units", "classes", "settling")
"""What a diagnosis of a merge of any number of models may measure."""

MEASURES = PAIR_MEASURES + MERGE_MEASURES
"""What a diagnosis may measure beside loss, metric and LLFC."""

SUGGESTIONS = ("weights", "layers")
"""What a diagnosis may suggest: one weight a model, or one a model and layer."""

CALIBRATION_METHODS = ("calibrate", "repair")
"""What of a merge is fitted to the blend of its parents' features: affine maps, or means and sizes of channels."""

TARGETS = ("blend", "own")
"""What a calibration imitates: the blend of all parents on the same samples, or each parent on samples of its own."""

HEADS = ("own", "first")
"""Under which head models are compared: each its own, or all that of the first, for models of different tasks."""

COMPARED = ("sample", "all", "none")
"""Of which tensors a dry run compares the task vectors."""

UNION = "union"
"""Value of `tokenizer_source` for the union of the models' vocabularies."""

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""What a run may be logged to: the trackers of accelerate."""

CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""Values of `chat_template` that name a template of ours; see `hf_llfc.checkpoints.chat_templates`."""

FORMS = ("model", "adapter")
"""Values of `save_as`: what a merge is written as."""

AUTO = "auto"
"""Value of `rank` for the smallest that keeps a change, of `chat_template` for the most frequent one of the models, of
`ridge` for one that is looked for."""
