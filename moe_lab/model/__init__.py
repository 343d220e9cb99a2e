from moe_lab.model.count import ParameterCount, count_parameters
from moe_lab.model.transformer import LanguageModel, Output, build_model

__all__ = ["LanguageModel", "Output", "ParameterCount", "build_model", "count_parameters"]
