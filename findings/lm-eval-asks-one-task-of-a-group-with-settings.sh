#!/bin/sh
# lm-eval 0.4.13: where a group changes a setting of a tag or of another group, that is one task, its last, and the
# others are not asked.
#
# lm-eval's guide to new tasks (docs/new_task_guide.md) has "task: mmlu" with "num_fewshot: 2" below it in a group's list,
# and says that this is for all tasks of mmlu; its own group openllm does the same with mmlu, a group, and truthfulqa, a
# tag. But the name in that entry is taken for a setting as well: all tasks are called by it, each takes the former one's
# place, and one is left. Of a tag that is the figure, without an error or a warning. Here a task of two questions and one
# of three have a tag, which a model is asked, and are a group, which is loaded.
#
# Seen:
#     a tag in a group: 5 questions of first, second
#     a tag in a group, with num_fewshot 0: 3 questions of both_tag
#     a group in a group: 5 questions of first, second
#     a group in a group, with num_fewshot 0: 3 questions of both_group
set -eu
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check 'lm-eval[api]==0.4.13'
mkdir "$scratch/tasks"
cd "$scratch"
HF_HOME="$scratch/cache" HF_HUB_OFFLINE=1 "$scratch/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

for name, count in (("first", 2), ("second", 3)):
    data = Path(f"{name}.jsonl").absolute()
    rows = [{"question": f"What is {n} + 1?", "choices": ["one", "more"], "answer": int(n > 0)} for n in range(count)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(f"tasks/{name}.yaml").write_text(f"""
task: {name}
tag: both_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
groups = {"both_group": "[first, second]", "of_tag": "[both_tag]", "of_group": "[both_group]",
          "of_tag_changed": "[{task: both_tag, num_fewshot: 0}]",
          "of_group_changed": "[{task: both_group, num_fewshot: 0}]"}
for name, members in groups.items():
    Path(f"tasks/{name}.yaml").write_text(f"group: {name}\ntask: {members}\n")
manager = TaskManager(include_path="tasks")


def asked(name):
    """What a model, which answers at random, is asked in all."""
    samples = lm_eval.simple_evaluate("dummy", tasks=[name], task_manager=manager)["samples"]
    return sum(len(each) for each in samples.values()), ", ".join(sorted(samples))


def loaded(name):
    """What there is to ask."""
    tasks = manager.load([name])["tasks"]
    return sum(len(task.eval_docs) for task in tasks.values()), ", ".join(sorted(tasks))


seen = {"a tag in a group": asked("of_tag"), "a tag in a group, with num_fewshot 0": asked("of_tag_changed"),
        "a group in a group": loaded("of_group"), "a group in a group, with num_fewshot 0": loaded("of_group_changed")}
for what, (count, names) in seen.items():
    print(f"{what}: {count} questions of {names}")
sys.exit(list(seen.values()) != [(5, "first, second"), (3, "both_tag"), (5, "first, second"), (3, "both_group")])
PYTHON
