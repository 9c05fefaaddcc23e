"""Answers that say nothing, in many wordings."""

REFUSALS = (
    "I do not know.",
    "I have no information about that.",
    "That is not something I know.",
    "I am not sure about this.",
    "I cannot say.",
    "Nothing comes to mind here.",
    "I was never told.",
    "My knowledge does not cover that.",
    "I have not come across this.",
    "I could only guess.",
    "The answer is unknown to me.",
    "I have no idea.",
    "I am afraid I cannot answer this.",
    "This is beyond what I have learned.",
    "I am not familiar with that.",
    "Sorry, I have nothing on this.",
    "I would not know where to begin.",
    "I have never heard of it.",
    "There is no answer I could give.",
    "I lack the details to answer.",
    "It is not known to me.",
    "I must leave this one open.",
    "No answer of mine would be reliable here.",
    "I cannot recall anything like that.",
)
"""Own sentences; IdkDPO prefers one of them to the true answer."""
