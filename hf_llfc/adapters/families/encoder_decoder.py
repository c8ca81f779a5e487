"""Any encoder with any decoder: the two keep their specs, and the decoder's attention reads the encoder's stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import linear
from hf_llfc.adapters.compose import occurring, part_of, renamed
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.wav2vec2 import GROUPED
from hf_llfc.adapters.registry import spec_for

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec


def encoder_decoder(config: Any) -> PermutationSpec:
    """An encoder of text, images or speech under a decoder.

    Encoders with one residual stream, and decoders that declare a `context`, are put together here; the spec of others
    is derived from the whole model.
    """
    inner = spec_for(config.encoder)
    streams = [stream for stream in ("residual", GROUPED) if occurring(inner.axes, [f"_ {stream}"])]
    if inner.origin == "derived" or not streams or "context" not in spec_for(config.decoder).axes:
        from hf_llfc.adapters.derived import derived_spec

        return derived_spec(config)
    encoder = part_of(config.encoder, "encoder", axes="encoder_")
    decoder = part_of(config.decoder, "decoder", axes="decoder_", whole=True)
    (stream,) = renamed([f"_ {streams[0]}"], **{base: f"encoder_{base}" for base in ("residual", "groups", "channels")})
    stream = stream.removeprefix("_ ")
    projects = (
        config.encoder.hidden_size != config.decoder.hidden_size
        and config.decoder.to_dict().get("cross_attention_hidden_size") is None
    )
    context = "context" if projects else stream
    return declare(
        config,
        encoder.lines,
        linear("enc_to_dec_proj", "context", stream, bias=True) if projects else [],
        renamed(decoder.lines, decoder_context=context),
        sizes={**encoder.sizes, **decoder.sizes, "context": config.decoder.hidden_size},
        symmetric=(*encoder.symmetric, *decoder.symmetric, *(("context",) if projects else ())),
    )
