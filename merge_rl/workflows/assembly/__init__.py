"""Settings into objects: networks, extractors, references, rewards; their memory and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from merge_rl.late import offered

if TYPE_CHECKING:
    from merge_rl.workflows.assembly.costs import PartCosts, cost_parts
    from merge_rl.workflows.assembly.defaults import (
        ModelDefaults,
        find_defaults,
        find_model,
        guidance_text,
        load_model,
        own_sampler,
        require_parts_of,
    )
    from merge_rl.workflows.assembly.extractors import (
        build_extractor,
        encoder_spans,
        encoders,
        own_weights,
        require_known,
    )
    from merge_rl.workflows.assembly.functions import Given
    from merge_rl.workflows.assembly.gradients import (
        auto_note,
        own_extractors,
        tried_in_vain,
        why_no_gradient,
        why_not_as_set,
    )
    from merge_rl.workflows.assembly.job import (
        GuideSet,
        Job,
        build_job,
        require_tuning,
        unweighed_map,
    )
    from merge_rl.workflows.assembly.memory import MemoryPlan, fit_batch, gib, plan_memory
    from merge_rl.workflows.assembly.networks import (
        Announce,
        load_autoencoder,
        load_network,
        load_weights,
        require_known_autoencoder,
        with_network,
    )
    from merge_rl.workflows.assembly.parts import OfParts, Parts, network_rollout
    from merge_rl.workflows.assembly.published import is_public
    from merge_rl.workflows.assembly.references import (
        ExtractorId,
        Statistics,
        expected_extractor,
        extractor_of,
        find_extractor,
        find_references,
        image_size,
        name_extractor,
        notes_of,
        other_resolutions,
        search_doubts,
    )
    from merge_rl.workflows.assembly.resolve import (
        allow_named,
        require_all_allowed,
        resolve_config,
        resolve_finetune,
    )
    from merge_rl.workflows.assembly.reward import (
        check_reward,
        known_terms,
        open_targets,
    )

__all__ = [
    "Announce",
    "ExtractorId",
    "Given",
    "GuideSet",
    "Job",
    "MemoryPlan",
    "ModelDefaults",
    "OfParts",
    "PartCosts",
    "Parts",
    "Statistics",
    "allow_named",
    "auto_note",
    "build_extractor",
    "build_job",
    "check_reward",
    "cost_parts",
    "encoder_spans",
    "encoders",
    "expected_extractor",
    "extractor_of",
    "find_defaults",
    "find_extractor",
    "find_model",
    "find_references",
    "fit_batch",
    "gib",
    "guidance_text",
    "image_size",
    "is_public",
    "known_terms",
    "load_autoencoder",
    "load_model",
    "load_network",
    "load_weights",
    "name_extractor",
    "network_rollout",
    "notes_of",
    "open_targets",
    "other_resolutions",
    "own_extractors",
    "own_sampler",
    "own_weights",
    "plan_memory",
    "require_all_allowed",
    "require_known",
    "require_known_autoencoder",
    "require_parts_of",
    "require_tuning",
    "resolve_config",
    "resolve_finetune",
    "search_doubts",
    "tried_in_vain",
    "unweighed_map",
    "why_no_gradient",
    "why_not_as_set",
    "with_network",
]

# Each is loaded when it is asked for: some need torch, others do without.
_HOMES: Final = {
    "costs": "PartCosts cost_parts",
    "defaults": (
        "ModelDefaults find_defaults find_model guidance_text load_model own_sampler "
        "require_parts_of"
    ),
    "extractors": "build_extractor encoder_spans encoders own_weights require_known",
    "functions": "Given",
    "gradients": "auto_note own_extractors tried_in_vain why_no_gradient why_not_as_set",
    "job": "GuideSet Job build_job require_tuning unweighed_map",
    "memory": "MemoryPlan fit_batch gib plan_memory",
    "networks": (
        "Announce load_autoencoder load_network load_weights require_known_autoencoder with_network"
    ),
    "parts": "OfParts Parts network_rollout",
    "published": "is_public",
    "references": (
        "ExtractorId Statistics expected_extractor extractor_of find_extractor find_references "
        "image_size name_extractor notes_of other_resolutions search_doubts"
    ),
    "resolve": "allow_named require_all_allowed resolve_config resolve_finetune",
    "reward": "check_reward known_terms open_targets",
}


def __getattr__(name: str) -> Any:
    return offered(__name__, name, _HOMES)
