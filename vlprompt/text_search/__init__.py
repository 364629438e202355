"""Search for hand-readable templates without gradients: who proposes, who scores, and the transcript between them.

Papers: Du et al., "IPO: Interpretable Prompt Optimization for Vision-Language Models", NeurIPS 2024, arXiv 2410.15397
(the loop, after OPRO, Yang et al., ICLR 2024); Zhou et al., "Survival of the Most Influential Prompts", Findings of
EMNLP 2023 (ClaPS: clustering and pruning). Nothing here knows classification: a scorer of another task runs the same
loop.
"""
