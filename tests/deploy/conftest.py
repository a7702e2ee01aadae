"""What tests of deployments share with the service's."""

from tests.service.conftest import checkpoint as checkpoint
