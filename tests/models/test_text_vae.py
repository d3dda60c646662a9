import pytest
import torch
from diffusers import AutoencoderKLWan

from refalign.errors import ArtifactError, GeometryError
from refalign.models.text import TextEncoder, pad_prompt_embeds
from refalign.models.vae import VideoVAE, convolve_planes
from refalign.toy import WEIGHTS_FOLDER

WAN = str(WEIGHTS_FOLDER / "wan")


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return TextEncoder.from_pretrained(WAN)


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    """A tiny autoencoder of the real class, whose normalisation is not the identity."""
    torch.manual_seed(0)
    model = AutoencoderKLWan(
        base_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=torch.linspace(-1, 1, 16).tolist(),
        latents_std=torch.linspace(0.5, 2, 16).tolist(),
    )
    return VideoVAE(model)


def make_frames(num_samples: int = 2, num_frames: int = 5) -> torch.Tensor:
    return torch.randint(
        0, 256, (num_samples, num_frames, 16, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_prompts_keep_their_own_tokens_only(text):
    short, long = text.encode(["a red fox", "a red fox &amp;   a blue ball in the snow"])
    assert len(short) < len(long) and short.shape[1] == text.model.config.d_model
    torch.testing.assert_close(short, text.encode(["a  red\nfox"])[0])  # neither its neighbour nor white space changes it
    assert len(text.encode(["a red fox"], max_tokens=2)[0]) == 2
    assert text.encode([]) == []


def test_padding_is_zeros_beyond_the_prompt(text):
    embeds = text.encode(["a red fox", "a blue ball in the snow"])
    padded = pad_prompt_embeds(embeds, 32)
    assert padded.shape[:2] == (2, 32)
    for row, own in zip(padded, embeds, strict=True):
        assert torch.equal(row[: len(own)], own) and not row[len(own) :].any()
    with pytest.raises(GeometryError, match="padded length is 2; encode with max_tokens=2"):
        pad_prompt_embeds(embeds, 2)


def test_text_encoder_and_vae_are_frozen(text, vae):
    for model in (text.model, vae.model):
        assert not model.training and not any(each.requires_grad for each in model.parameters())
    latents = vae.encode(make_frames())
    embeds = text.encode(["a red fox"])[0]
    assert not latents.requires_grad and not embeds.requires_grad
    weight = torch.ones((), requires_grad=True)
    (weight * (latents.sum() + embeds.sum())).backward()
    assert all(each.grad is None for model in (text.model, vae.model) for each in model.parameters())


def test_latents_are_the_normalised_mode(vae):
    frames = make_frames()
    latents = vae.encode(frames)
    assert latents.shape == (2, 16, 2, 2, 4) and latents.dtype == torch.float32
    with torch.no_grad():
        mode = vae.model.encode(frames.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mode()
    for channel in range(16):
        mean, std = vae.model.config.latents_mean[channel], vae.model.config.latents_std[channel]
        torch.testing.assert_close(latents[:, channel], (mode[:, channel] - mean) / std)


def test_convolutions_in_planes_give_the_numbers_of_those_in_three_dimensions():
    torch.manual_seed(1)
    model = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()
    pixels = torch.rand(2, 3, 9, 32, 32) * 2 - 1

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        latents = model.encode(pixels).latent_dist.mode()
        return [latents, model.encode(pixels[:, :, :1]).latent_dist.mode(), model.decode(latents).sample]

    expected = run()
    convolve_planes(model)
    assert "forward" in vars(model.decoder.conv_in)
    for planes, volumes in zip(run(), expected, strict=True):
        torch.testing.assert_close(planes, volumes, rtol=1e-3, atol=1e-4)
        assert not torch.equal(planes, volumes), "the fast way was not taken"


def test_images_are_encoded_each_alone_as_one_frame_videos(vae):
    frames = make_frames()
    images = vae.encode_images(frames[:, 0])
    assert images.shape == (2, 16, 2, 4)
    torch.testing.assert_close(images[1], vae.encode(frames[1:, :1])[0, :, 0])
    torch.testing.assert_close(images, vae.encode(frames)[:, :, 0])  # causal: the first frame does not see the next


def test_decode_undoes_the_normalisation_and_returns_frames(vae):
    latents = torch.randn(1, 16, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    frames = vae.decode(latents)
    assert frames.shape == (1, 5, 16, 32, 3) and frames.dtype == torch.uint8
    mean, std = (torch.tensor(vae.model.config[name])[None, :, None, None, None] for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        pixels = vae.model.decode(latents * std + mean).sample
    torch.testing.assert_close(frames.permute(0, 4, 1, 2, 3) / 127.5 - 1, pixels, rtol=0, atol=1 / 127.5)


def test_tiling_works_as_in_diffusers():
    tiled = VideoVAE.from_pretrained(WAN)
    tiled.model.enable_tiling(32, 32, 16, 16)
    assert tiled.decode(tiled.encode(torch.zeros(1, 1, 48, 48, 3, dtype=torch.uint8))).shape == (1, 1, 48, 48, 3)


def test_sizes_the_vae_would_cut_are_refused(vae):
    with pytest.raises(GeometryError, match="6 frames of 16 x 32 px do not fit"):
        vae.encode(make_frames(1, 5)[:, [0, 1, 2, 3, 4, 4]])
    with pytest.raises(GeometryError, match="5 frames of 12 x 32 px do not fit"):
        vae.encode(make_frames(1, 5)[:, :, :12])


@pytest.mark.parametrize("load", [TextEncoder.from_pretrained, VideoVAE.from_pretrained])
def test_missing_folders_are_named(load, tmp_path):
    with pytest.raises(ArtifactError, match="no such model folder"):
        load(str(tmp_path))
