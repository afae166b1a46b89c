"""Off-policy distillation, for which the cookbook has a trainer but no recipe.

Usage: off_policy_distillation.py MODEL DATA.jsonl STUDENT_STATE TEACHER_SAMPLER LOG_PATH
"""

import asyncio
import importlib
import sys
from typing import Any

# Installed in the cookbook's environment only.
_train: Any = importlib.import_module("tinker_cookbook.distillation.train_off_policy")
_datasets: Any = importlib.import_module("tinker_cookbook.distillation.datasets")
_data: Any = importlib.import_module("tinker_cookbook.supervised.data")
_types: Any = importlib.import_module("tinker_cookbook.supervised.types")


def main() -> None:
    model, data, student, teacher, log_path = sys.argv[1:]
    common = _types.ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model,
        renderer_name="qwen3_instruct",
        max_length=256,
        batch_size=16,
    )
    pair = _train.DatasetWithTeacher(
        dataset_builder=_data.FromConversationFileBuilder(common_config=common, file_path=data),
        teacher_config=_datasets.TeacherConfig(base_model=model, load_checkpoint_path=teacher),
    )
    config = _train.Config(
        learning_rate=0.002,
        dataset_configs=[pair],
        model_name=model,
        recipe_name="off_policy_distillation",
        renderer_name="qwen3_instruct",
        n_teacher_targets=8,
        batch_size=16,
        save_every=0,
        load_checkpoint_path=student,
        log_path=log_path,
    )
    asyncio.run(_train.main(config))


if __name__ == "__main__":
    main()
