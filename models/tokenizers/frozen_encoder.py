"""What a tokenizer answers whose encoder is a frozen VFM, and whose decoder is of one image size (RAE)."""

from torch import nn

from errors import UserError


class FrozenEncoder:
    """Stands before :class:`models.tokenizers.base.Tokenizer` among the bases of a class.

    Attributes:
        kind: its name, for messages.
    """

    kind: str

    @property
    def image_size(self) -> int:
        """Side of its images, pixels: the only one."""
        raise NotImplementedError

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        size = self.image_size
        if resolution != size:
            raise UserError(f"this {self.kind} decodes to {size} px only, not to {resolution}: give {size} px images")
        return super().latent_shape(resolution)

    def check_trainable(self, encoder: bool = True) -> None:
        if encoder:
            raise UserError(
                f"the kind {self.kind} is not trained whole, because its encoder is a frozen VFM: cache its latents as "
                "they are, or train its decoder, with --freeze-encoder --align-coeff 0 of train_sendvae.py"
            )

    @property
    def encoder_last_layer(self) -> nn.Parameter:
        raise UserError(f"the encoder of the kind {self.kind} is frozen")
