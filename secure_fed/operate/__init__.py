"""What people do beside a run: new studies, the doctor, exports, evidence, closing."""
