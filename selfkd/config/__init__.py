"""Configuration: a schema of frozen, strict dataclasses, read from YAML, `--set` and flags."""

from selfkd.config.load import RESUMABLE as RESUMABLE
from selfkd.config.load import differences as differences
from selfkd.config.load import dump_config as dump_config
from selfkd.config.load import flat as flat
from selfkd.config.load import load_config as load_config
from selfkd.config.load import merge_settings as merge_settings
from selfkd.config.load import parse_yaml as parse_yaml
from selfkd.config.load import resume_invariant as resume_invariant
from selfkd.config.schema import RESERVED_ARGS as RESERVED_ARGS
from selfkd.config.schema import ArmConfig as ArmConfig
from selfkd.config.schema import CheckpointConfig as CheckpointConfig
from selfkd.config.schema import Config as Config
from selfkd.config.schema import ContrastConfig as ContrastConfig
from selfkd.config.schema import Control as Control
from selfkd.config.schema import DataConfig as DataConfig
from selfkd.config.schema import DistillConfig as DistillConfig
from selfkd.config.schema import ModelConfig as ModelConfig
from selfkd.config.schema import SearchConfig as SearchConfig
from selfkd.config.schema import Source as Source
from selfkd.config.schema import TrainConfig as TrainConfig
from selfkd.config.schema import Tree as Tree
from selfkd.config.schema import from_tree as from_tree
from selfkd.config.schema import to_tree as to_tree
