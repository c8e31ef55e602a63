"""Dynamic Label Injection: donors, plans, blends."""
from .._door import door

__all__, __getattr__, __dir__ = door(__name__, {
    "blending": "BLENDS BlendOptions cut_paste grow_mask poisson_blend poisson_blend_image",
    "donors": "DonorPool DonorTransform default_margin",
    "plan": "InjectionPlan find_clean",
    "injection": "DynamicLabelInjection show_batch",
    "loops": "InjectBatch",
})
