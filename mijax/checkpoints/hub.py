"""Files of a model on the Hugging Face hub, in the cache of `huggingface_hub`."""

from collections.abc import Sequence
from pathlib import Path

from mijax.checkpoints import bundled


def fetch(name: str, allowed: Sequence[str], ignored: str | None, revision: str | None, token: str | None) -> Path:
    """Fetch some files of a model, where they are not cached.

    Args:
        name: the model's id.
        allowed: the files to fetch, as patterns.
        ignored: a pattern of files that are not.
        revision: a branch, tag or commit.
        token: an access token, by default the one that this machine has.

    Returns:
        The model's folder in the cache.

    Raises:
        ConnectionError: for files that are neither cached nor can be fetched.
        ValueError: for a model or revision that the hub does not have, and a name that is no id.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, token=token, allow_patterns=list(allowed), ignore_patterns=ignored
            )
        )
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is neither a path, nor a known name ({', '.join(bundled.MODELS)}), nor a hub id"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"the Hugging Face hub has no model {name!r} that you may read") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"the Hugging Face hub has no revision {revision!r} of {name!r}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{name!r} is not cached and the Hugging Face hub cannot be reached. Connect once, or copy the model's"
            " folder (config.json, *.safetensors, tokenizer.json) here and give mijax.load its path"
        ) from error
