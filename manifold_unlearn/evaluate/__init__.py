"""What a model knows and does, measured."""

from manifold_unlearn.evaluate.aggregate import (
    Aggregates,
    Judgement,
    judge,
    published_aggregates,
)
from manifold_unlearn.evaluate.controls import shuffled_weights
from manifold_unlearn.evaluate.depth import (
    UnlearningDepth,
    cka_erasure,
    patching_drop,
    unlearning_depth,
    unlearning_depth_score,
)
from manifold_unlearn.evaluate.depth_control import (
    ControlledDepth,
    controlled_depth,
)
from manifold_unlearn.evaluate.detection import Detection, detect_texts, detection_auroc
from manifold_unlearn.evaluate.dictionary_absorption import (
    Absorption,
    AbsorptionRule,
    feature_absorption,
)
from manifold_unlearn.evaluate.dictionary_fidelity import (
    DictionaryFidelity,
    LatentUse,
    Reconstruction,
    dictionary_fidelities,
    dictionary_fidelity,
)
from manifold_unlearn.evaluate.dictionary_probing import (
    SparseProbing,
    sparse_probing,
)
from manifold_unlearn.evaluate.dictionary_recovery import (
    SpliceFidelity,
    splice_fidelity,
)
from manifold_unlearn.evaluate.dictionary_saebench import (
    SAEBenchAdapter,
    SAEBenchConfig,
)
from manifold_unlearn.evaluate.dictionary_scr import (
    SpuriousRemoval,
    spurious_removal,
)
from manifold_unlearn.evaluate.dictionary_splice import (
    ablated,
    spliced,
)
from manifold_unlearn.evaluate.dictionary_tpp import (
    TargetedPerturbation,
    targeted_perturbation,
)
from manifold_unlearn.evaluate.dictionary_unlearning import (
    DictionaryUnlearning,
    UnlearningSetting,
    dictionary_unlearning,
    forget_latents,
)
from manifold_unlearn.evaluate.fluency import (
    n_gram_entropy,
    reference_fluency,
    repetition,
)
from manifold_unlearn.evaluate.forgetting import (
    ForgettingReport,
    Standing,
    Yardstick,
    compare_profiles,
    evaluate_forgetting,
    require_same_tokenizer,
    yardstick,
)
from manifold_unlearn.evaluate.lens import (
    LensProfile,
    frozen_head_drop,
    lens_leak,
    logit_lens,
)
from manifold_unlearn.evaluate.likelihood import (
    Subject,
    TokenScores,
    answer_log_probabilities,
    answer_scores,
    greedy_answers,
    plain,
    text_log_probabilities,
    text_scores,
)
from manifold_unlearn.evaluate.memorization import (
    exact_memorization,
    exact_memorization_published,
    extraction_strength,
    extraction_strength_published,
    knowledge_memorization,
    token_memorization,
    verbatim_memorization,
)
from manifold_unlearn.evaluate.metrics import (
    answer_probability,
    answer_probability_published,
    answer_rank,
    forget_quality,
    harmonic_mean,
    model_utility,
    option_probability,
    perplexity,
    truth_ratio,
    truth_ratio_preference,
    truth_ratio_probability,
    truth_ratio_probability_published,
    truth_ratio_published,
    truth_ratio_symmetric,
    truth_ratio_symmetric_published,
)
from manifold_unlearn.evaluate.multiple_choice import (
    ChoiceQuestion,
    ChoiceScores,
    choice_questions,
    score_choices,
)
from manifold_unlearn.evaluate.privacy import (
    MembershipInference,
    gradient_norms,
    membership_inference,
    membership_scores,
    membership_similarity,
    privacy_leakage,
    relative_difference,
)
from manifold_unlearn.evaluate.probe_tasks import (
    ProbeTask,
    attribute_task,
    truth_task,
)
from manifold_unlearn.evaluate.probes import (
    ProbeResult,
    probe,
    probe_rows,
)
from manifold_unlearn.evaluate.profiles import (
    EvaluationSets,
    Profile,
    profile,
)
from manifold_unlearn.evaluate.results import (
    Change,
    Metric,
    paired_difference,
)
from manifold_unlearn.evaluate.rouge import (
    rouge_l_f1,
    rouge_l_recall,
)
from manifold_unlearn.evaluate.sampling import (
    leak_at_k,
    sample_answers,
    sampled_leakage,
)
from manifold_unlearn.evaluate.steering import (
    SteeringProbe,
    concept_log_odds,
    measure_steering,
    steered_at,
    steering_sweep,
)
from manifold_unlearn.evaluate.steering_curves import (
    MatchedComparison,
    SteeringCurve,
    SteeringPoint,
    matched,
)
from manifold_unlearn.evaluate.suites import (
    ScoredAnswers,
    assess,
    assess_text,
    model_report,
    score_answers,
    summarize,
)

__all__ = [
    "Absorption",
    "AbsorptionRule",
    "Aggregates",
    "Change",
    "ChoiceQuestion",
    "ChoiceScores",
    "ControlledDepth",
    "Detection",
    "DictionaryFidelity",
    "DictionaryUnlearning",
    "EvaluationSets",
    "ForgettingReport",
    "Judgement",
    "LatentUse",
    "LensProfile",
    "MatchedComparison",
    "MembershipInference",
    "Metric",
    "ProbeResult",
    "ProbeTask",
    "Profile",
    "Reconstruction",
    "SAEBenchAdapter",
    "SAEBenchConfig",
    "ScoredAnswers",
    "SparseProbing",
    "SpliceFidelity",
    "SpuriousRemoval",
    "Standing",
    "SteeringCurve",
    "SteeringPoint",
    "SteeringProbe",
    "Subject",
    "TargetedPerturbation",
    "TokenScores",
    "UnlearningDepth",
    "UnlearningSetting",
    "Yardstick",
    "ablated",
    "answer_log_probabilities",
    "answer_probability",
    "answer_probability_published",
    "answer_rank",
    "answer_scores",
    "assess",
    "assess_text",
    "attribute_task",
    "choice_questions",
    "cka_erasure",
    "compare_profiles",
    "concept_log_odds",
    "controlled_depth",
    "detect_texts",
    "detection_auroc",
    "dictionary_fidelities",
    "dictionary_fidelity",
    "dictionary_unlearning",
    "evaluate_forgetting",
    "exact_memorization",
    "exact_memorization_published",
    "extraction_strength",
    "extraction_strength_published",
    "feature_absorption",
    "forget_latents",
    "forget_quality",
    "frozen_head_drop",
    "gradient_norms",
    "greedy_answers",
    "harmonic_mean",
    "judge",
    "knowledge_memorization",
    "leak_at_k",
    "lens_leak",
    "logit_lens",
    "matched",
    "measure_steering",
    "membership_inference",
    "membership_scores",
    "membership_similarity",
    "model_report",
    "model_utility",
    "n_gram_entropy",
    "option_probability",
    "paired_difference",
    "patching_drop",
    "perplexity",
    "plain",
    "privacy_leakage",
    "probe",
    "probe_rows",
    "profile",
    "published_aggregates",
    "reference_fluency",
    "relative_difference",
    "repetition",
    "require_same_tokenizer",
    "rouge_l_f1",
    "rouge_l_recall",
    "sample_answers",
    "sampled_leakage",
    "score_answers",
    "score_choices",
    "shuffled_weights",
    "sparse_probing",
    "splice_fidelity",
    "spliced",
    "spurious_removal",
    "steered_at",
    "steering_sweep",
    "summarize",
    "targeted_perturbation",
    "text_log_probabilities",
    "text_scores",
    "token_memorization",
    "truth_ratio",
    "truth_ratio_preference",
    "truth_ratio_probability",
    "truth_ratio_probability_published",
    "truth_ratio_published",
    "truth_ratio_symmetric",
    "truth_ratio_symmetric_published",
    "truth_task",
    "unlearning_depth",
    "unlearning_depth_score",
    "verbatim_memorization",
    "yardstick",
]
