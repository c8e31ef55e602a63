"""The study: many runs, their tables and figures."""
from .._door import door

__all__, __getattr__, __dir__ = door(__name__, {
    "studies": "STUDIES missing study_configs",
    "matrix": "FailedRuns projected_cost run_matrix",
    "parts": "PartsAnswer parts_configs study_parts",
    "tables": "admissibility_table readable table1 table2 table3_iou_per_class",
    "figures": "fig3_iou_per_class fig4_qualitative fig5_weak_supervision fig6_weak_qualitative "
               "fig7_ablation_qualitative table1_differences table5_weak_supervision",
    "comparisons": "comparisons_figure comparisons_table influence_figure noise_table power_figure power_table",
    "questions": "attribution_figure attribution_table ladder_figure ladder_table leakage_figure leakage_table "
                 "policy_figure policy_table replication_figure replication_table shortcut_figure shortcut_table",
    "illustrations": "dataset_numbers fig1_pipeline fig2_histogram fig8_blends",
    "artifacts": "best_text comparison_text draw_artifact lead_text leak_text notebook_runs weak_text",
})
