"""Attacks that bring back what a model was made to forget, each with its compute."""

from manifold_unlearn.attack.ablation import (
    ablation_attack,
)
from manifold_unlearn.attack.backdoor import (
    BackdoorReport,
    DefenceReport,
    measure_backdoor,
    measure_defence,
    reverse_engineered_success,
    trigger_recall,
)
from manifold_unlearn.attack.behaviors import (
    Behavior,
    read_advbench,
    read_behaviors,
    read_harmbench,
    read_refusal_direction,
    read_strongreject,
)
from manifold_unlearn.attack.chat import (
    chat_prompt,
    model_reply,
)
from manifold_unlearn.attack.gcg import (
    GCGConfig,
    find_suffix,
    gcg_attack,
)
from manifold_unlearn.attack.jailbreak import (
    JailbreakReport,
    attack_success,
)
from manifold_unlearn.attack.judges import (
    Judge,
    KeywordJudge,
    Scores,
    backdoorllm_judge,
    refusal_judge,
)
from manifold_unlearn.attack.knowledge import (
    accuracy_of,
    probability_of,
    recall_of,
)
from manifold_unlearn.attack.latent import (
    LatentConfig,
    latent_attack,
)
from manifold_unlearn.attack.prompts import (
    few_shot_attack,
    framing_attack,
    paraphrase_attack,
    prefill_attack,
)
from manifold_unlearn.attack.quantize import (
    Rounding,
    quantization_attack,
    quantized,
)
from manifold_unlearn.attack.relearn import (
    disjoint_facts_attack,
    relearning_attack,
    steps_to,
)
from manifold_unlearn.attack.results import (
    AttackCurve,
    Knowledge,
)
from manifold_unlearn.attack.rubric import (
    RubricJudge,
    inspect_score,
    parse_rubric,
    strongreject_score,
)
from manifold_unlearn.attack.sampled import (
    sampling_attack,
)
from manifold_unlearn.attack.soft_prompt import (
    SoftPromptConfig,
    soft_prompt_attack,
)
from manifold_unlearn.attack.suite import (
    ATTACKS,
    BUDGETS,
    AttackGap,
    AttackResults,
    Budget,
    attack_gaps,
    run_attacks,
)

__all__ = [
    "ATTACKS",
    "BUDGETS",
    "AttackCurve",
    "AttackGap",
    "AttackResults",
    "BackdoorReport",
    "Behavior",
    "Budget",
    "DefenceReport",
    "GCGConfig",
    "JailbreakReport",
    "Judge",
    "KeywordJudge",
    "Knowledge",
    "LatentConfig",
    "Rounding",
    "RubricJudge",
    "Scores",
    "SoftPromptConfig",
    "ablation_attack",
    "accuracy_of",
    "attack_gaps",
    "attack_success",
    "backdoorllm_judge",
    "chat_prompt",
    "disjoint_facts_attack",
    "few_shot_attack",
    "find_suffix",
    "framing_attack",
    "gcg_attack",
    "inspect_score",
    "latent_attack",
    "measure_backdoor",
    "measure_defence",
    "model_reply",
    "paraphrase_attack",
    "parse_rubric",
    "prefill_attack",
    "probability_of",
    "quantization_attack",
    "quantized",
    "read_advbench",
    "read_behaviors",
    "read_harmbench",
    "read_refusal_direction",
    "read_strongreject",
    "recall_of",
    "refusal_judge",
    "relearning_attack",
    "reverse_engineered_success",
    "run_attacks",
    "sampling_attack",
    "soft_prompt_attack",
    "steps_to",
    "strongreject_score",
    "trigger_recall",
]
