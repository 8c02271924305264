package ledger

// ZipFile is one file of an archive, for tests that make their own.
type ZipFile struct {
	Name string
	Data []byte
}

// WriteZip makes an archive in the form that bundles have.
func WriteZip(fs []ZipFile) []byte {
	var z []zipFile
	for _, f := range fs {
		z = append(z, zipFile{f.Name, f.Data})
	}
	return writeZip(z)
}

// ReadZip reads one.
func ReadZip(b []byte) ([]ZipFile, error) {
	z, bad := readZip(b, maxBundleFiles)
	if bad != nil {
		return nil, bad
	}
	var out []ZipFile
	for _, f := range z {
		out = append(out, ZipFile{f.name, f.data})
	}
	return out, nil
}

// Remanifest replaces bundle.json, the first file, by one that fits the others.
func Remanifest(fs []ZipFile) []ZipFile {
	var z []zipFile
	for _, f := range fs[1:] {
		z = append(z, zipFile{f.Name, f.Data})
	}
	return append([]ZipFile{{"bundle.json", manifestOf(z)}}, fs[1:]...)
}
